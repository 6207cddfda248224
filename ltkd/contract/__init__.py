"""What all three packages share: records, class groups, bundles and image decoding. Never imports torch."""
