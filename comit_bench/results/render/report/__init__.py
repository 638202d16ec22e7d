"""The report: one HTML file of views over records. ``page.py`` puts it together; read it first."""
