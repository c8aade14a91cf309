"""What stands between clients and models: the metering gateway, its tokenizers, a small model server for laptops."""
