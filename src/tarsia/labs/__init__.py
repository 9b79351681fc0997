"""Experiments that anyone can run: the demo, the blood cells, and the rows that they are made of."""
