"""Where evaluations run: in this process, or on Ray."""
