"""Several adapters made one, and one made part of its base: arithmetic on values, each step proved."""
