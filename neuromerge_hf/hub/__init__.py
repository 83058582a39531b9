"""Publishing a merged model."""
