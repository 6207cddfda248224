"""Test whether a converted model kept its accuracy in every class group: splits, statistics, gates, calibration."""
