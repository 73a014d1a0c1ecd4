"""What runs and comparisons look like to a reader: pages, plots and tables."""
