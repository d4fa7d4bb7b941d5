"""Estimate the density of nuclei on a slide from a random part of it."""
