"""One file per operation: its mathematics, reference, autograd and public function."""
