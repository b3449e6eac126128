"""Networks and the parts that several methods share."""
