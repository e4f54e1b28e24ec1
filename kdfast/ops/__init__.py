"""Operators: one file per family, each with public function, autograd Function, fake kernel and plain-torch reference.
May import nothing else of kdfast."""
