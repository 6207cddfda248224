"""The certification report for people: HTML page, plots, console tables, model card."""
