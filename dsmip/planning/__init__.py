"""Planning: parameters, bytes, memory and seconds of a configuration on a data set, before anything long starts."""
