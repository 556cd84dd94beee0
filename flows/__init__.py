"""What runs, and when: one flow per file. How a step is done stands in `tasks`."""
