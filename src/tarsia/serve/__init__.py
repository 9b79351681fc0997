"""One base in memory that serves many adapters: rows of all of them in one pass, each as it would be alone."""
