"""Measuring tools; not part of the product."""
