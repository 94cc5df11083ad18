"""How mechanisms are computed. A kernel declares what it runs; the plan chooses."""
