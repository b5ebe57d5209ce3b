"""The draft methods by name: what a configuration may ask for."""
