"""kdfast beside what others compute the same numbers with: plain torch, liger-kernel, TRL, torchtune."""
