"""What an evaluation looks like to a person: figures, sentences, templates."""
