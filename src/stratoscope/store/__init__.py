"""What is fetched and what is kept: packages, the hub, the user's cache, tensors and `Fitted`."""
