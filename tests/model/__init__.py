"""An exhaustive checker of the pair's rules: every order of events, to a stated depth."""
