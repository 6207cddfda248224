"""Code that all three packages share: records, class groups, bundles and image decoding. It never imports torch."""
