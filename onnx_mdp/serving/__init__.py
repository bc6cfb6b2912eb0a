"""What model servers, trackers and re-checkers read: a model in their own layout."""
