"""Features of samples: computed once, stored, and dealt to training and evaluation."""
