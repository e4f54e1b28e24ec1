"""Models and finished runs, measured and shown: tables and plots. May import: recipes and what those may."""
