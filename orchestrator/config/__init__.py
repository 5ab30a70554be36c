"""Configuration: cluster, chip, job and conditions files, from text with places to frozen values."""
