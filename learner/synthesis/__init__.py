"""New problems made by the policy from its own, labelled, scored, and asked like any other."""
