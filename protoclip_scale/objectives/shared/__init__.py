"""What several objectives are made of; each is no objective itself."""
