"""Whole training runs on random weights, drawn from the space of recipes, to hold a plan of memory to.

A *world* is a checkpoint of a family on disk, with its tokenizer, its processor and its chat template; a
*configuration* is a world, rows and a recipe, all of them a function of one seed. ``python -m bench.grid SEED`` runs
one and prints what was measured beside what was planned.
"""
