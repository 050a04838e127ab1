"""Flower's configuration."""
