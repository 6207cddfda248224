"""The certification report in readable form: HTML page, plots, console tables and model card."""
