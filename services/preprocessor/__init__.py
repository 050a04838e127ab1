"""CPU worker that tokenizes training data ahead of time and takes `lamplighter.submit` messages."""
