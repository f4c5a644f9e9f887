"""What a picture will cost, before any weight is loaded; and how to make it with the memory that there is."""
