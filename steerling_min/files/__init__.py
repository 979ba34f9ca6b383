"""What lies on disk: checkpoints, config.json, labels; loading and saving them."""
