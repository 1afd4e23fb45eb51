"""What is shown and written about a run: progress, logs, plots and pages."""
