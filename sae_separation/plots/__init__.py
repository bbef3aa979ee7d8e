"""What plot.py is made of: run folders read, tables, figures and the report. Imports no torch."""
