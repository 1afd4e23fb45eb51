"""Every setting: its schema, and arguments, files and other trainers' names that give it a value."""
