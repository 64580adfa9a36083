"""The verb `report`: a page to look at, made of what prune left in OUT/streamprune.json."""
