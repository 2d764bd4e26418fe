"""Exports in the layouts that other libraries load."""
