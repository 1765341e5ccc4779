"""Learning through a deployment: graded, recorded responses, and gates trained on them."""
