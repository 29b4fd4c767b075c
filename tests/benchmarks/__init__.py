"""What the methods and the report cost. Run by hand, never by the tests."""
