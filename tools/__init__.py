"""Command-line tools around the packages: run each as `python -m tools.<name>`. Not shipped in the wheel."""
