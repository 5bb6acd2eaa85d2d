"""What the actors are asked: source, curriculum, template, ticket."""
