"""Methods side by side at the same share of the tokens: accuracy, FLOPs, time, memory."""
