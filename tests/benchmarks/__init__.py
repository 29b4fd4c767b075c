"""What the methods cost, as ratios. Run by hand, never by the tests."""
