"""Towers, projections, heads, temperatures and batch norm over lane groups."""
