"""What a target needs beyond the artifact: one folder, one builder."""
