"""Layouts that other libraries load, the model card and the Hub."""
