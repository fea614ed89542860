"""How fast the parts are, beside the least that they can cost and beside what others do."""
