"""What can be measured about a trained fusion model, one family a file."""
