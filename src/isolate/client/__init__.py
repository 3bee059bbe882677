"""Floor 5, outside: the owner's and the user's side. It holds handles and keys, never data."""
