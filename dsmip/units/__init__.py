"""Units: what systems are made of; matching units, experts, the gate, and the contract of a matcher."""
